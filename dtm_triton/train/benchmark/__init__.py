"""What the training benchmark needs: inputs without a network, a stopwatch for a step's parts, operations counted."""
