"""CrossGET on LLaVA-1.5: score.py reads answer files of LLaVA's evaluation; the README has the paper's table."""
