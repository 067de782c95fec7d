"""Reports of finished runs: tables, figures, the HTML page and RESULTS.md."""
