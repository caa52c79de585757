"""`python -m pgolf` is the `pgolf` command."""

import sys


def main() -> int:
    try:
        from pgolf.cli import main as command
    except KeyboardInterrupt:  # which the command tells for itself once it is there
        return 130
    return command()


if __name__ == "__main__":
    sys.exit(main())
