"""``python -m pytest_nullspace attest-verify FILE DIR``: is this adapter the one that was gated?"""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from pytest_nullspace.errors import NullspaceError
from pytest_nullspace.shell.attest import verify

GATE = "to gate an adapter: pytest --nullspace-model=PATH --nullspace-calib-dataset=TEXT --nullspace-task-dataset=TEXT"
SHOWN = 20
"""Lines about what differs, at most."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: error: {message}\n{GATE}\n")


def main() -> int:
    """Verify a statement: 0 where every file is what was gated and did not fail, 1 elsewhere, 2 for usage."""
    parser = _Parser(prog="python -m pytest_nullspace", epilog=GATE)
    commands = parser.add_subparsers(required=True, parser_class=argparse.ArgumentParser)
    command = commands.add_parser(
        "attest-verify",
        help="hash an adapter's files and hold them against the statement that --nullspace-attest wrote",
        description="Hash an adapter's files and hold them against a statement. Its signature is verified by the tool "
        "that made it (cosign, gh attestation verify).",
    )
    command.add_argument("file", type=Path, help="the statement, FILE.intoto.json")
    command.add_argument("directory", type=Path, help="the adapter's directory")
    command.add_argument("--base", type=Path, help="the base model's directory, to be held against it as well")
    options = parser.parse_args()
    try:
        found = verify(options.file, options.directory, options.base)
    except NullspaceError as error:
        print(error, file=sys.stderr)
        return 1
    for wrong in found.wrong[:SHOWN]:
        print(f"✗ {wrong}", file=sys.stderr)
    if found.wrong:
        more = f" ({len(found.wrong)} differences)" if len(found.wrong) > SHOWN else ""
        print(f"{options.directory}: not what was gated{more}", file=sys.stderr)
        return 1
    beside = f"; {found.unseen} files of its base were not looked at (--base)" if found.unseen else ""
    print(f"{options.directory}: {found.files} files are what was gated, result {found.result}{beside}")
    return 1 if found.result == "FAILED" else 0


if __name__ == "__main__":
    sys.exit(main())
