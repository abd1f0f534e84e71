"""`python -m diffdiscover3d.cli` runs the command line."""

from diffdiscover3d.cli.app import main

if __name__ == "__main__":
    main()
