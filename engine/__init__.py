"""What every script shares: training loop, checkpoints, processes, devices, command lines."""
