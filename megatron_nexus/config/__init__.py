"""What a run is: frozen sections, presets, the command line, the rules between fields. Imports no torch."""
