"""``python -m privimage_fast`` is the ``privimage`` command."""

import sys

from privimage_fast.cli import main

sys.exit(main())
