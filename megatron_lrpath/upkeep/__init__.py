"""Maintenance of a main path over years: disk space, rewinds, and the history of documents."""
