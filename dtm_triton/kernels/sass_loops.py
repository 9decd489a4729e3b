"""Which instructions of NVIDIA machine code lie in loops: spills there cost on every turn.

Loops are the strongly connected parts of the control flow graph, so it does not matter where the compiler placed their
blocks. Jumps that are not understood fail loudly.
"""

from __future__ import annotations

import re

INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,6})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*);", re.M)
ADDRESS = re.compile(r"0x([0-9a-f]+)\s*$")
FORWARD = ("BRA", "BSSY", "CALL", "JMP")  # these name where they lead
UNKNOWN = ("BRX", "JMX", "JMXU", "BRXU")


def loop_spills(sass: str, depth: int) -> int:
    """How many loads from and stores to local memory lie in at least `depth` loops.

    >>> loop = "    /*0000*/  LDL R1, [R1] ;\\n    /*0010*/  STL [R1], R1 ;\\n    /*0020*/  @P0 BRA 0x10 ;\\n"
    >>> loop_spills(loop, depth=1), loop_spills(loop, depth=2)
    (1, 0)
    """
    code = [(int(address, 16), guard, name, rest) for address, guard, name, rest in INSTRUCTION.findall(sass)]
    assert code, "no machine code"
    place = {address: i for i, (address, *_) in enumerate(code)}
    following: dict[int, list[int]] = {}
    for i, (_, guard, name, rest) in enumerate(code):
        kind = name.split(".")[0]
        assert kind not in UNKNOWN, f"jump to an unknown place: {name}{rest}"
        ends = kind in ("EXIT", "RET", "BRA", "JMP") and not guard and not re.match(r"\s*!?U?P\d", rest)
        following[i] = [] if ends or i + 1 == len(code) else [i + 1]
        if kind in FORWARD:
            target = ADDRESS.search(rest.rstrip())
            assert target, f"{name}{rest} does not say where"
            following[i].append(place[int(target[1], 16)])
    inside = set(following)
    for turn in range(depth):
        loops = components(following, inside)
        inside = set().union(*loops) if turn == depth - 1 else set().union(*(without_head(p, following) for p in loops))
    return sum(code[i][2].startswith(("LDL", "STL")) for i in inside)


def without_head(part: set[int], following: dict[int, list[int]]) -> set[int]:
    """A loop without the instructions by which it is entered: what still turns then is a loop within it."""
    entries = {j for i, successors in following.items() if i not in part for j in successors if j in part}
    return part - (entries or {min(part)})


def components(following: dict[int, list[int]], inside: set[int]) -> list[set[int]]:
    """The parts of the graph in which every instruction reaches every other: its outermost loops (Tarjan)."""
    number: dict[int, int] = {}
    lowest: dict[int, int] = {}
    stack: list[int] = []
    waiting: set[int] = set()
    found: list[set[int]] = []
    for root in inside:
        path = [(root, iter(following[root]))] if root not in number else []
        while path:
            node, successors = path[-1]
            if node not in number:
                number[node] = lowest[node] = len(number)
                stack.append(node)
                waiting.add(node)
            for successor in successors:
                if successor not in inside:
                    continue
                if successor not in number:
                    path.append((successor, iter(following[successor])))
                    break
                if successor in waiting:
                    lowest[node] = min(lowest[node], number[successor])
            else:
                path.pop()
                if path:
                    lowest[path[-1][0]] = min(lowest[path[-1][0]], lowest[node])
                if lowest[node] == number[node]:
                    part: set[int] = set()
                    while node not in part:
                        waiting.discard(stack[-1])
                        part.add(stack.pop())
                    if len(part) > 1 or node in following[node]:
                        found.append(part)
    return found
