"""`python -m pgolf` is the `pgolf` command."""

import signal
import sys


def main() -> int:
    try:
        try:
            from pgolf.cli import main as command

            return command()
        finally:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # or Python's own end would print a traceback for it
    except KeyboardInterrupt:  # before the command can tell it for itself, or when it just has
        return 130


if __name__ == "__main__":
    sys.exit(main())
