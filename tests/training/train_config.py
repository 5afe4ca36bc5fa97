"""Train a config given as JSON; what torchrun starts in the tests."""

import json
import sys
from pathlib import Path

from eclosion import train
from eclosion.errors import UserError

try:
    train(json.loads(Path(sys.argv[1]).read_text()))
except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
