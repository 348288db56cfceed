"""HTTP and WebSocket as ComfyUI speaks them, and the official editor on top: a server without torch."""
