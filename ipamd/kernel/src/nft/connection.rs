//! The connection: replacing and removing tables, and finding out whether ours is as it was written.

use netlink_packet_netfilter::nftables::{
    ChainAttribute, ChainMessage, ExpressionAttribute, Expressions, GenAttribute, GenMessage, ListAttribute,
    NfTablesMessage, RuleAttribute, RuleMessage, SetElementList, SetElementMessage, TableAttribute, TableMessage,
};
use netlink_packet_netfilter::{NetfilterMessage, NetfilterMessageInner};
use netlink_sys::protocols::NETLINK_NETFILTER;
use nix::errno::Errno;
use sha1::{Digest, Sha1};
use tokio::sync::Mutex;

use super::encode::{add, comment, remove, request, transaction};
use super::table::{Family, Table};
use crate::error::KernelError;
use crate::netns::Netns;
use crate::nl::{Raw, Socket};

/// Family, version, and the low half of the generation, which changes with everybody's tables.
const GENERIC_HEADER_BYTES: usize = 4;

/// A connection to the nftables of one namespace.
pub struct Nft {
    socket: Mutex<Socket>,
}

/// A table as it was right after it was written. While two of them are equal nobody has touched the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fingerprint {
    /// Goes up with every change to any table of the namespace, whoever makes it.
    generation: Option<u32>,
    content: [u8; 20],
}

impl Nft {
    /// Connects to the calling thread's namespace.
    pub fn open() -> Result<Self, KernelError> {
        Ok(Self { socket: Mutex::new(Socket::open(NETLINK_NETFILTER)?) })
    }

    /// Connects to another namespace.
    pub fn in_namespace(netns: &Netns) -> Result<Self, KernelError> {
        Ok(Self { socket: Mutex::new(Socket::open_in(netns, NETLINK_NETFILTER)?) })
    }

    /// Puts a table in place of the one of that name, in one transaction: no packet ever sees neither or half of one.
    pub async fn replace(&self, table: &Table) -> Result<(), KernelError> {
        let mut messages = remove(table.family(), table.name());
        messages.extend(add(table));
        let operation = format!("replace nftables table {}", table.name());
        self.socket.lock().await.transaction(transaction(&operation, messages)).await
    }

    /// Replaces a table and reads its fingerprint, again where somebody else changed the ruleset meanwhile.
    pub async fn replace_and_watch(&self, table: &Table) -> Result<Fingerprint, KernelError> {
        const TRIES: u32 = 5;
        let mut last = None;
        for _ in 0..TRIES {
            let before = self.generation().await?;
            self.replace(table).await?;
            let fingerprint = self.fingerprint(table).await?;
            if self.generation().await? == before.map(|generation| generation.wrapping_add(1)) {
                return Ok(fingerprint);
            }
            last = Some(fingerprint);
        }
        // Somebody changes the ruleset all the time. What was read last is most probably ours; it is compared for good
        // when the others pause.
        last.ok_or_else(|| KernelError::Torn {
            operation: format!("read nftables table {}", table.name()),
            tries: TRIES,
        })
    }

    /// Removes a table; absent means done.
    pub async fn remove(&self, family: Family, name: &str) -> Result<(), KernelError> {
        let operation = format!("remove nftables table {name}");
        self.socket.lock().await.transaction(transaction(&operation, remove(family, name))).await
    }

    pub async fn exists(&self, family: Family, name: &str) -> Result<bool, KernelError> {
        Ok(self.comment_of(family, name).await?.is_some())
    }

    /// True where a table of that name and content stands, by its comment; its rules are not looked at.
    pub async fn has_digest(&self, table: &Table) -> Result<bool, KernelError> {
        Ok(self.comment_of(table.family(), table.name()).await?.as_deref() == Some(comment(&table.digest()).as_slice()))
    }

    /// The table's user data; empty where it has none, `None` where there is no such table.
    async fn comment_of(&self, family: Family, name: &str) -> Result<Option<Vec<u8>>, KernelError> {
        let wanted = TableMessage { attributes: vec![TableAttribute::Name(name.to_owned())] };
        let get = request(family, format!("look up nftables table {name}"), NfTablesMessage::GetTable(wanted), 0);
        let answers = match self.socket.lock().await.one(get).await {
            Err(e) if e.errno() == Some(Errno::ENOENT) => return Ok(None),
            answers => answers?,
        };
        let table = tables_messages(&answers).find_map(|message| match message {
            NfTablesMessage::NewTable(table) => Some(table.attributes.iter().find_map(|attribute| match attribute {
                TableAttribute::UserData(bytes) => Some(bytes.clone()),
                _ => None,
            })),
            _ => None,
        });
        Ok(table.map(Option::unwrap_or_default))
    }

    /// Reads a table's fingerprint.
    pub async fn fingerprint(&self, table: &Table) -> Result<Fingerprint, KernelError> {
        // The number is read first: a change in between makes it old, and the next comparison reads everything again.
        let generation = self.generation().await?;
        Ok(Fingerprint { generation, content: self.content(table).await? })
    }

    /// Whether a table still is what it was at a fingerprint. Costs one exchange while nobody changes any table;
    /// otherwise the table is read, and the fingerprint brought up to date if it is unchanged.
    pub async fn unchanged(&self, table: &Table, since: &mut Fingerprint) -> Result<bool, KernelError> {
        let generation = self.generation().await?;
        if generation.is_some() && generation == since.generation {
            return Ok(true);
        }
        let unchanged = self.has_digest(table).await? && self.content(table).await? == since.content;
        if unchanged {
            since.generation = generation;
        }
        Ok(unchanged)
    }

    async fn generation(&self) -> Result<Option<u32>, KernelError> {
        let wanted = GenMessage { attributes: Vec::new() };
        let get = request(Family::Ip, "read the nftables generation", NfTablesMessage::GetGen(wanted), 0);
        let answers = self.socket.lock().await.one(get).await?;
        let generation = tables_messages(&answers).find_map(|message| match message {
            NfTablesMessage::NewGen(message) => message.attributes.iter().find_map(|attribute| match attribute {
                GenAttribute::Id(id) => Some(*id),
                _ => None,
            }),
            _ => None,
        });
        Ok(generation)
    }

    /// A hash over chains, rules and elements as the kernel shows them, without what counts packets.
    async fn content(&self, table: &Table) -> Result<[u8; 20], KernelError> {
        let mut socket = self.socket.lock().await;
        let mut hash = Sha1::new();
        let (family, name) = (table.family(), table.name());

        let operation = format!("read nftables table {name}");
        let chains = NfTablesMessage::GetChain(ChainMessage { attributes: Vec::new() });
        let wanted = request(family, operation.clone(), chains, 0).message;
        for message in tables_messages(&socket.dump(&operation, wanted).await?) {
            if let NfTablesMessage::NewChain(ChainMessage { attributes }) = message
                && attributes.contains(&ChainAttribute::Table(name.to_owned()))
            {
                hash.update(format!("{attributes:?}"));
            }
        }
        let rules = NfTablesMessage::GetRule(RuleMessage { attributes: vec![RuleAttribute::Table(name.to_owned())] });
        let wanted = request(family, operation.clone(), rules, 0).message;
        for message in tables_messages(&socket.dump(&operation, wanted).await?) {
            if let NfTablesMessage::NewRule(RuleMessage { attributes }) = message
                && attributes.contains(&RuleAttribute::Table(name.to_owned()))
            {
                hash.update(format!("{:?}", attributes.iter().map(without_counters).collect::<Vec<_>>()));
            }
        }
        for set in table.sets.iter().map(|set| &set.name).chain(table.maps.iter().map(|map| &map.name)) {
            let attributes = vec![SetElementList::Table(name.to_owned()), SetElementList::Set(set.clone())];
            let elements = NfTablesMessage::GetSetElement(SetElementMessage { attributes });
            let wanted = request(family, operation.clone(), elements, 0).message;
            match socket.dump_as(&operation, wanted, |Raw(answer)| Some(answer)).await {
                Ok(answers) => {
                    for answer in &answers {
                        hash.update(answer.get(GENERIC_HEADER_BYTES..).unwrap_or_default());
                    }
                }
                // A set that is gone is a difference like any other.
                Err(e) if e.errno() == Some(Errno::ENOENT) => hash.update("no such set"),
                Err(e) => return Err(e),
            }
        }
        Ok(hash.finalize().into())
    }
}

fn tables_messages(messages: &[NetfilterMessage]) -> impl Iterator<Item = &NfTablesMessage> {
    messages.iter().filter_map(|message| match &message.inner {
        NetfilterMessageInner::NfTables(message) => Some(message),
        _ => None,
    })
}

fn without_counters(attribute: &RuleAttribute) -> RuleAttribute {
    let RuleAttribute::Expressions(expressions) = attribute else { return attribute.clone() };
    let counts = |attribute: &ExpressionAttribute| {
        matches!(
            attribute,
            ExpressionAttribute::Data(Expressions::Other { expression_type, .. }) if expression_type == "counter"
        )
    };
    let kept = expressions.iter().filter(|expression| match expression {
        ListAttribute::Element(attributes) => !attributes.iter().any(counts),
        _ => true,
    });
    RuleAttribute::Expressions(kept.cloned().collect())
}
