"""The app of diffdiscover3d as a Hugging Face Space, which sets the address and port by environment variables."""

from diffdiscover3d.app import serve

serve(max_size_mb=200)
