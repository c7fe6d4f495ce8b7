"""What a parameter is: its axes, its share on a rank, its first values, its cost. No torch.distributed."""
