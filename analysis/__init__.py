"""Pictures and tables from a search's ledger: `python -m analysis.NAME results/SEARCH`. A search draws its report with it,
and goes on without where that fails; every picture is written beside a CSV of what it drew."""
