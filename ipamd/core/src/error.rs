//! How an error is told.

use std::error::Error;
use std::fmt::Write as _;

/// An error with its causes on one line, outermost first. A cause that was told already, as part of what it caused, is left
/// out.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let said = cause.to_string();
        if !text.contains(&said) {
            let _ = write!(text, ": {said}");
        }
        next = cause.source();
    }
    text
}
