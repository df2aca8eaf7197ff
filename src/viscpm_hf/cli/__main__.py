"""`python -m viscpm_hf.cli`, as launchers of several processes start it."""

from .main import main


raise SystemExit(main())
