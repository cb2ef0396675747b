"""Files from strangers, checked, and folders that appear whole: strict JSON, safetensors, publishing by one rename."""
