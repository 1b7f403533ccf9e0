"""The job's configuration: typed sections, the YAML reader and the layout's arithmetic."""
