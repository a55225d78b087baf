//! Inference for agents: language models in GGUF files, served over MCP to all of them at once.
//!
//! ```text
//! vsock, Unix socket or stdio ── one JSON-RPC message a line ──► server (MCP tools: chat, generate, embed, tokenize)
//!                                                                  │ templates, checks, progress, cancellation
//!                                                                  ▼
//!                                                                engine (a thread a model): fair queue, continuous batching,
//!                                                                  │ prefix cache, sampling
//!                                                                  ▼
//!                                                                llama.cpp
//! ```
//!
//! Model files are checked by `ark-gguf` before llama.cpp sees them. Callers are hostile: every text, list and line has a bound,
//! and what is refused is refused in a sentence and a word for programs (`data.reason`).

pub mod engine;
pub mod server;
