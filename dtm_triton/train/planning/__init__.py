"""What a run on many GPUs will need: sizes counted, rates measured or assumed, and the arithmetic on them."""
