"""What several test files share: starting programs and ranks, small checkpoints and models, the reference."""
