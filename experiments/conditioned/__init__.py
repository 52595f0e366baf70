"""Merging that knows the text: does a CLIP find more when different texts keep different patches?"""
