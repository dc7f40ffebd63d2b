# SPDX-License-Identifier: Apache-2.0
"""`python -m tuckctl`."""

from tuckctl.cli import main

if __name__ == "__main__":
    main()
