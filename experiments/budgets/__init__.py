"""Is a budget kept, and is a schedule fitted to some images no worse than the same r in every block?"""
