"""Pure functions on arrays: the three recurrences and what models need around them. No modules, no
state.
"""
