//! The writer of EC2's XML: elements in order, text escaped, nothing else.

use std::fmt::{Display, Write};

pub(crate) const EC2_NAMESPACE: &str = "http://ec2.amazonaws.com/doc/2016-11-15/";
pub(crate) const STS_NAMESPACE: &str = "https://sts.amazonaws.com/doc/2011-06-15/";

/// Collects elements. A body that is built is always well formed: elements close by leaving their closure.
#[derive(Debug, Default)]
pub(crate) struct Xml(String);

impl Xml {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn leaf(&mut self, name: &str, value: impl Display) -> &mut Self {
        self.open(name);
        let mut escaped = Escaped(&mut self.0);
        write!(escaped, "{value}").expect("invariant: writing to a string does not fail");
        self.close(name);
        self
    }

    pub(crate) fn opt(&mut self, name: &str, value: Option<impl Display>) -> &mut Self {
        if let Some(value) = value {
            self.leaf(name, value);
        }
        self
    }

    pub(crate) fn element(&mut self, name: &str, fill: impl FnOnce(&mut Self)) -> &mut Self {
        self.open(name);
        fill(self);
        self.close(name);
        self
    }

    /// A list in EC2's way: an element of `item`s. An empty list is an empty element, not an absent one.
    pub(crate) fn list<T>(
        &mut self,
        name: &str,
        items: impl IntoIterator<Item = T>,
        mut fill: impl FnMut(&mut Self, T),
    ) -> &mut Self {
        self.element(name, |xml| {
            for item in items {
                xml.element("item", |xml| fill(xml, item));
            }
        })
    }

    /// A list whose items are plain texts.
    pub(crate) fn texts<T: Display>(&mut self, name: &str, items: impl IntoIterator<Item = T>) -> &mut Self {
        self.element(name, |xml| {
            for item in items {
                xml.leaf("item", item);
            }
        })
    }

    fn open(&mut self, name: &str) {
        self.0.push('<');
        self.0.push_str(name);
        self.0.push('>');
    }

    fn close(&mut self, name: &str) {
        self.0.push_str("</");
        self.0.push_str(name);
        self.0.push('>');
    }

    pub(crate) fn into_string(self) -> String {
        self.0
    }
}

struct Escaped<'a>(&'a mut String);

impl Write for Escaped<'_> {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        for c in text.chars() {
            match c {
                '<' => self.0.push_str("&lt;"),
                '>' => self.0.push_str("&gt;"),
                '&' => self.0.push_str("&amp;"),
                '"' => self.0.push_str("&quot;"),
                // XML 1.0 has no way to carry the other control characters.
                c if c.is_control() && !matches!(c, '\t' | '\n' | '\r') => self.0.push('\u{fffd}'),
                c => self.0.push(c),
            }
        }
        Ok(())
    }
}

/// The whole answer to an EC2 action.
pub(crate) fn answer(action: &str, request_id: &str, body: Xml) -> String {
    format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<{action}Response xmlns=\"{EC2_NAMESPACE}\">\
         <requestId>{request_id}</requestId>{}</{action}Response>",
        body.into_string()
    )
}

/// EC2's refusal, which has a shape of its own and no namespace.
pub(crate) fn refusal(code: &str, message: &str, request_id: &str) -> String {
    let mut xml = Xml::new();
    xml.element("Response", |xml| {
        xml.element("Errors", |xml| {
            xml.element("Error", |xml| {
                xml.leaf("Code", code).leaf("Message", message);
            });
        });
        xml.leaf("RequestID", request_id);
    });
    format!("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n{}", xml.into_string())
}

/// The whole answer to an STS action.
pub(crate) fn sts_answer(action: &str, request_id: &str, body: Xml) -> String {
    format!(
        "<{action}Response xmlns=\"{STS_NAMESPACE}\"><{action}Result>{}</{action}Result>\
         <ResponseMetadata><RequestId>{request_id}</RequestId></ResponseMetadata></{action}Response>",
        body.into_string()
    )
}

/// STS's refusal: the shape of the plain Query protocol.
pub(crate) fn sts_refusal(code: &str, message: &str, request_id: &str) -> String {
    let mut xml = Xml::new();
    xml.element("Error", |xml| {
        xml.leaf("Type", "Sender").leaf("Code", code).leaf("Message", message);
    });
    xml.leaf("RequestId", request_id);
    format!("<ErrorResponse xmlns=\"{STS_NAMESPACE}\">{}</ErrorResponse>", xml.into_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_escaped_and_empty_lists_are_elements() {
        let mut xml = Xml::new();
        xml.leaf("a", "<&\">\u{1}").texts("set", ["x"]).list("none", Vec::<u8>::new(), |_, _| ());
        xml.opt("absent", None::<u8>);
        assert_eq!(xml.into_string(), "<a>&lt;&amp;&quot;&gt;\u{fffd}</a><set><item>x</item></set><none></none>");
    }
}
