"""What tenants store, below every API that stores: records in the state store, contents in a folder or object store."""
