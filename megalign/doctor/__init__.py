"""Looks at machines, network, storage and inputs before a job starts, under the launcher of the job."""
