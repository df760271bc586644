"""Find stored models (folder, Hub, bundled), and read their files and tensors."""
