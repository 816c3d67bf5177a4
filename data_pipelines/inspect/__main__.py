"""`python -m data_pipelines.inspect`: see `data_pipelines.inspection`.

A folder, and without an __init__.py: a module inspect.py, or a package, would stand in for Python's
own `inspect` wherever data_pipelines/ is the first place to look for modules, as it is for
`python data_pipelines/prepare.py`; a folder alone never does.
"""

import sys

from data_pipelines.inspection import main

sys.exit(main())
