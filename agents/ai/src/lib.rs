//! What `ark-ai` is made of: a client of MCP over the host's vsock port.

pub mod mcp;
