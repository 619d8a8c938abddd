//! How a command fails: what it says, and its exit status.

/// Why a command failed.
#[derive(Debug)]
pub enum Failure {
    /// It was used wrongly: exit status 2.
    Usage(String),
    /// It was tried and failed: exit status 1.
    Failed(anyhow::Error),
}

impl Failure {
    /// A failure told by `what`.
    pub fn failed(what: impl Into<String>) -> Self {
        Self::Failed(anyhow::Error::msg(what.into()))
    }

    /// The exit status.
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::Usage(_) => 2,
            Self::Failed(_) => 1,
        }
    }

    /// Whether whoever read our output has gone, which is nothing to complain about.
    pub fn is_broken_pipe(&self) -> bool {
        match self {
            Self::Usage(_) => false,
            Self::Failed(error) => error
                .downcast_ref::<std::io::Error>()
                .is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe),
        }
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Usage(what) => f.write_str(what),
            Self::Failed(error) => f.write_str(&told(error)),
        }
    }
}

/// An error with its causes, leaving out those whose text is in what was said already.
fn told(error: &anyhow::Error) -> String {
    error.chain().fold(String::new(), |mut text, cause| {
        let cause = cause.to_string();
        if text.is_empty() {
            return cause;
        }
        if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
        text
    })
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}
