"""Draw the losses of several runs in one picture: see `--help`."""

from megatron_nexus.commands.plot_runs import main

if __name__ == "__main__":
    main()
