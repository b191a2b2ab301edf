"""`brn-serve`: the service and the dashboard in one process."""

from __future__ import annotations

import sys

from dashboard.app import create_app
from service.__main__ import serve


def main() -> int:
    return serve(create_app, prog="brn-serve")


if __name__ == "__main__":
    sys.exit(main())
