#!/usr/bin/env python3
"""An image of one static program and nothing else, in the same way as deploy/image.py makes the daemon's.

usage: tests/image.py OUT.tar NAME:TAG PROGRAM [ARGUMENT...]
"""

import io
import os
import sys
import tarfile

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "../deploy"))
sys.dont_write_bytecode = True
import image  # noqa: E402


def main():
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    out, name, path, *arguments = sys.argv[1:]
    program = os.path.basename(path)
    files = io.BytesIO()
    with tarfile.open(fileobj=files, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        image.add(archive, program, image.program(path, "build it as .cargo/config.toml says"), 0o755)
    image.write(out, name, files.getvalue(), [f"/{program}"], arguments)


if __name__ == "__main__":
    main()
