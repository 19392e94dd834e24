"""Directories of the authors' code, github.com/YouAreSpecialToMe/QST at 27cef0a."""
