"""What a run will cost before it starts: parameters, FLOPs, memory per rank. Starts no process group."""
