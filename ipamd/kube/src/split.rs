//! Objects out of a stream of JSON, one by one, so that never more than one is held: the items of a list, or the events of
//! a watch. Knows strings and depth and nothing else; what an object says is read by others.

/// No object of Kubernetes is larger: etcd takes 1.5 MiB.
pub const MAX_OBJECT_BYTES: usize = 4 << 20;

/// What is being split.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// One object after another.
    Events,
    /// One object, with an array of objects in it; what is beside the array is the frame.
    List,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("more than {MAX_OBJECT_BYTES} bytes for one object")]
pub struct TooLarge;

#[derive(Debug)]
pub struct Splitter {
    shape: Shape,
    depth: u32,
    in_string: bool,
    escaped: bool,
    /// Inside the array of a list.
    in_items: bool,
    object: Vec<u8>,
    frame: Vec<u8>,
}

impl Splitter {
    pub fn new(shape: Shape) -> Self {
        let (object, frame) = (Vec::new(), Vec::new());
        Self { shape, depth: 0, in_string: false, escaped: false, in_items: false, object, frame }
    }

    /// Hands on every object that these bytes complete.
    pub fn feed(&mut self, bytes: &[u8], mut whole: impl FnMut(&[u8])) -> Result<(), TooLarge> {
        for byte in bytes {
            if self.take(*byte) {
                whole(&self.object);
                self.object.clear();
                // One large object must not cost its memory for as long as the stream lives.
                self.object.shrink_to(64 << 10);
            }
            if self.object.len().max(self.frame.len()) > MAX_OBJECT_BYTES {
                return Err(TooLarge);
            }
        }
        Ok(())
    }

    /// What is around a list's items, with the array empty.
    pub fn frame(&self) -> &[u8] {
        &self.frame
    }

    /// Takes one byte; true when an object has become whole.
    fn take(&mut self, byte: u8) -> bool {
        let floor = u32::from(self.in_items) * 2;
        let was_string = self.in_string;
        if self.in_string {
            self.in_string = self.escaped || byte != b'"';
            self.escaped = !self.escaped && byte == b'\\';
        } else {
            match byte {
                b'"' => self.in_string = true,
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' => self.depth = self.depth.saturating_sub(1),
                _ => {}
            }
        }
        let bracket = !was_string && !self.in_string;
        if self.shape == Shape::List && !self.in_items {
            self.frame.push(byte);
            // The only array that lies directly in a list.
            self.in_items = bracket && byte == b'[' && self.depth == 2;
            return false;
        }
        if self.in_items && bracket && byte == b']' && self.depth == 1 {
            self.in_items = false;
            self.frame.push(byte);
            return false;
        }
        // Commas and white space between objects.
        if self.object.is_empty() && !(bracket && byte == b'{') {
            return false;
        }
        self.object.push(byte);
        bracket && byte == b'}' && self.depth == floor
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn split(shape: Shape, text: &str, cut: usize) -> (Vec<Value>, Vec<u8>) {
        let mut splitter = Splitter::new(shape);
        let mut objects = Vec::new();
        let (first, second) = text.as_bytes().split_at(cut.min(text.len()));
        for part in [first, second] {
            splitter.feed(part, |object| objects.push(serde_json::from_slice(object).unwrap())).unwrap();
        }
        (objects, splitter.frame().to_vec())
    }

    fn object() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![Just(json!(null)), any::<i32>().prop_map(|n| json!(n)), ".*".prop_map(|s| json!(s))];
        let value = leaf.prop_recursive(3, 16, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map(".*", inner, 0..4).prop_map(|map| json!(map)),
            ]
        });
        prop::collection::btree_map(".*", value, 0..4).prop_map(|map| json!(map))
    }

    proptest! {
        #[test]
        fn a_stream_cut_anywhere_gives_its_objects(objects in prop::collection::vec(object(), 0..5), cut in any::<usize>()) {
            let text: String = objects.iter().map(|object| format!("{object}\n")).collect();
            let cut = cut % (text.len() + 1);
            prop_assert_eq!(split(Shape::Events, &text, cut).0, objects);
        }

        #[test]
        fn a_list_cut_anywhere_gives_its_items_and_its_frame(
            items in prop::collection::vec(object(), 0..5),
            cut in any::<usize>(),
            pretty in any::<bool>(),
        ) {
            let list = json!({ "apiVersion": "v1", "metadata": { "resourceVersion": "7" }, "items": items });
            let text = if pretty { format!("{list:#}") } else { list.to_string() };
            let (found, frame) = split(Shape::List, &text, cut % (text.len() + 1));
            prop_assert_eq!(found, items);
            let frame: Value = serde_json::from_slice(&frame).unwrap();
            prop_assert_eq!(frame, json!({ "apiVersion": "v1", "metadata": { "resourceVersion": "7" }, "items": [] }));
        }
    }

    #[test]
    fn what_never_ends_is_refused() {
        let mut splitter = Splitter::new(Shape::Events);
        let piece = vec![b'a'; 1 << 20];
        assert_eq!(splitter.feed(b"{\"a\":\"", |_| ()), Ok(()));
        let fed = (0..5).try_for_each(|_| splitter.feed(&piece, |_| ()));
        assert_eq!(fed, Err(TooLarge));
    }
}
