"""Pictures and tables from a search's ledger: `python -m analysis.NAME results/SEARCH`. Nothing here is computed twice
or needed by a search; every picture is written beside a CSV of what it drew."""
