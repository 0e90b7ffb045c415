"""The numbered steps from an empty schema to the present one."""
