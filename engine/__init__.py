"""What every script shares: training loop, checkpoints, processes, devices. It knows no BERT."""
