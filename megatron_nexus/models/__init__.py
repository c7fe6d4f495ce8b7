"""What is computed: single-device maths over each rank's share of the parameters. Never reads data."""
