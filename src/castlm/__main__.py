"""`python -m castlm`, which is what `torchrun -m castlm` starts."""

import sys

from castlm.cli.main import main

sys.exit(main())
