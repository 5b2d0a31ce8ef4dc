//! An answer counts only if it has its end.
//!
//! The SDK's XML reader takes the end of the bytes for the end of every open list: an answer that was cut between two
//! elements would be a shorter list, and an ENI would seem to have lost its addresses. So a successful answer must close the
//! element it opens with; one that does not is `Malformed`.

use aws_sdk_ec2::config::interceptors::AfterDeserializationInterceptorContextRef;
use aws_sdk_ec2::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_sdk_ec2::error::BoxError;

#[derive(Debug)]
pub struct WholeAnswers;

impl Intercept for WholeAnswers {
    fn name(&self) -> &'static str {
        "WholeAnswers"
    }

    fn read_after_deserialization(
        &self,
        context: &AfterDeserializationInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let response = context.response();
        match response.body().bytes() {
            Some(body) if response.status().is_success() && !is_whole(body) => Err("the answer has no end".into()),
            _ => Ok(()),
        }
    }
}

/// The document closes its outermost element at its very end.
fn is_whole(body: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(body) else { return false };
    let opened = text.split('<').skip(1).find(|tag| !tag.starts_with(['?', '!']));
    let Some(root) = opened.and_then(|tag| tag.split(|c: char| c.is_whitespace() || c == '>' || c == '/').next())
    else {
        return false;
    };
    let end = text.trim_end();
    // Most elements of an answer are closed too, so that closing is not enough: it must be the outermost one's.
    end.strip_suffix('>').and_then(|end| end.trim_end().strip_suffix(root)).is_some_and(|end| end.ends_with("</"))
}

#[cfg(test)]
mod tests {
    use super::is_whole;

    #[test]
    fn an_answer_is_whole_when_its_outermost_element_is_closed() {
        for whole in [
            "<A></A>",
            "<?xml version=\"1.0\"?>\n<A xmlns=\"u\">\n<b>1</b><c/></A>\n",
            "<!-- by a mock --><A><b/></A >",
        ] {
            assert!(is_whole(whole.as_bytes()), "{whole}");
        }
        for part in ["", "A", "<", "<A>", "<A><b></b>", "<A><A1></A1>", "<A></A", "<A></AA>", "<?xml version=\"1.0\"?>"]
        {
            assert!(!is_whole(part.as_bytes()), "{part}");
        }
        assert!(!is_whole(b"<A>\xff</A>"));
    }
}
