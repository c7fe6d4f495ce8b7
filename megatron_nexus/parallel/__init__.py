"""Where parameters live: the world, the mesh of ranks, collectives, pipeline stages."""
