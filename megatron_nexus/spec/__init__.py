"""What a parameter is: its logical axes, its share on a rank, its first values, its cost. No torch.distributed."""
