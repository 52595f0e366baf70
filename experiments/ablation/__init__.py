"""Which part of CrossGET does what, without training: run.py measures, report.py writes the tables and figures."""
