"""Readers and writers of volume formats, one file per format; `registry` recognises a file's format."""
