//! What the MCP servers of NOA ARK share: the inference VM's, and that of `arkd`, which passes calls on to it.
//!
//! | module | what is there |
//! |---|---|
//! | [`lines`] | one JSON-RPC message a line, over any stream |
//! | [`params`] | what the tools take and give |
//! | [`code`], [`OWNER`] | errors and `_meta` beyond the protocol's own |

pub mod lines;
pub mod params;

/// Codes beyond JSON-RPC's own, from the range it leaves to servers.
pub mod code {
    use rmcp::model::ErrorCode;

    /// Too many calls wait; another replica or a later try may do.
    pub const OVERLOADED: ErrorCode = ErrorCode(-32010);
    /// The call's time was over; `data` has what there was.
    pub const DEADLINE: ErrorCode = ErrorCode(-32011);
    /// The engine could not go on; `data` has what there was.
    pub const FAILED: ErrorCode = ErrorCode(-32012);
    /// The caller cancelled it, or left.
    pub const CANCELLED: ErrorCode = ErrorCode(-32013);
    /// The server is going down.
    pub const STOPPING: ErrorCode = ErrorCode(-32014);
}

/// Key of a request's `_meta` that says whose call it is: owners take turns.
pub const OWNER: &str = "noa-ark/owner";

/// Longest time that a call may take, milliseconds.
pub const MAX_TIMEOUT_MS: u64 = 3_600_000;
