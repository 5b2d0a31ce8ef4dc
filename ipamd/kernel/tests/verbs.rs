//! The verbs on links, addresses, routes, rules and neighbours, in any namespace.

mod common;

use common::{add_netns, in_testbed, ip, sh, snapshot, v4};
use flatwire_kernel::netns::{create_named, in_netns, remove_named};
use flatwire_kernel::{KernelError, Netlink, Netns, Route, Rule, VethEnd};

#[test]
fn named_namespaces_come_and_go() {
    in_testbed(|| async {
        let own = Netns::current().unwrap().id().unwrap();
        let made = create_named("/run/netns/made", true).await.unwrap();
        assert_ne!(made.id().unwrap(), own);
        assert_eq!(Netns::open("/run/netns/made").unwrap().id().unwrap(), made.id().unwrap());
        assert_eq!(ip("-n made link show lo")[0]["flags"][1], "UP");
        assert_eq!(Netns::current().unwrap().id().unwrap(), own, "the caller stays where it is");
        let inside = in_netns(&made, || Netns::current().and_then(|n| n.id()).map_err(std::io::Error::other)).unwrap();
        assert_eq!(inside, made.id().unwrap());
        assert!(create_named("/run/netns/made", false).await.is_err(), "a name is taken once");
        for _ in 0..2 {
            remove_named("/run/netns/made").unwrap();
        }
        assert!(matches!(Netns::open("/run/netns/made"), Err(KernelError::NetnsMissing { .. })));
    });
}

#[test]
fn a_cable_between_two_namespaces() {
    in_testbed(|| async {
        let (_, left) = add_netns("left");
        let (_, right) = add_netns("right");
        let before = snapshot(None);
        let here = Netlink::open().unwrap();
        let mac = "02:00:00:00:00:0a".parse().unwrap();
        here.veth(
            &VethEnd::new("eth0").mac(mac).mtu(9001).in_netns(&left),
            &VethEnd::new("eth0").mtu(9001).in_netns(&right),
        )
        .await
        .unwrap();
        assert_eq!(snapshot(None), before, "neither end is ever here");

        let nl = Netlink::in_namespace(&left).unwrap();
        nl.set_up("eth0").await.unwrap();
        nl.address("eth0", "10.0.0.1/24".parse().unwrap()).await.unwrap();
        nl.address("eth0", "10.0.0.1/24".parse().unwrap()).await.unwrap();
        nl.route("eth0", &Route::to("10.1.0.0/16".parse().unwrap()).via(v4("10.0.0.9"))).await.unwrap();
        nl.route("eth0", &Route::default_via(v4("192.0.2.1")).onlink().table(7)).await.unwrap();
        nl.blackhole("10.2.0.0/16".parse().unwrap(), 254).await.unwrap();
        nl.neighbour("eth0", v4("10.0.0.9"), mac).await.unwrap();
        nl.rule(&Rule::lookup(100, 7).from("10.0.0.1/32".parse().unwrap())).await.unwrap();
        nl.rule(&Rule::lookup(100, 7).from("10.0.0.1/32".parse().unwrap())).await.unwrap();

        let link = &ip("-n left link show eth0")[0];
        assert_eq!((&link["address"], &link["mtu"]), (&"02:00:00:00:00:0a".into(), &9001.into()));
        assert_eq!(ip("-n left route show 10.1.0.0/16")[0]["gateway"], "10.0.0.9");
        assert_eq!(ip("-n left route show table 7")[0]["flags"][0], "onlink");
        assert_eq!(ip("-n left route show 10.2.0.0/16")[0]["type"], "blackhole");
        assert_eq!(ip("-n left neigh show 10.0.0.9")[0]["state"][0], "PERMANENT");
        assert_eq!(ip("-n left rule show pref 100").len(), 1, "never twice");
        let names: Vec<String> = nl.links().await.unwrap().into_iter().map(|link| link.name).collect();
        assert_eq!(names, ["lo", "eth0"]);

        nl.delete_rule(&Rule::lookup(100, 7).from("10.0.0.1/32".parse().unwrap())).await.unwrap();
        nl.delete_rule(&Rule::lookup(100, 7).from("10.0.0.1/32".parse().unwrap())).await.unwrap();
        nl.delete_route("10.2.0.0/16".parse().unwrap(), 254).await.unwrap();
        nl.delete_route("10.2.0.0/16".parse().unwrap(), 254).await.unwrap();
        nl.remove_address("eth0", "10.0.0.1/24".parse().unwrap()).await.unwrap();
        nl.remove_address("eth0", "10.0.0.1/24".parse().unwrap()).await.unwrap();
        nl.set_down("eth0").await.unwrap();
        nl.rename("eth0", "eth7").await.unwrap();
        nl.set_mtu("eth7", 1400).await.unwrap();
        nl.move_to("eth7", &right).await.unwrap();
        assert_eq!(ip("-n right link show eth7")[0]["mtu"], 1400);
        assert!(ip("-n left rule show pref 100").is_empty());
        let nl = Netlink::in_namespace(&right).unwrap();
        for _ in 0..2 {
            nl.delete_link("eth7").await.unwrap();
        }
        assert_eq!(ip("-n right link").len(), 1);
    });
}

#[test]
fn errors_name_their_object_and_carry_the_kernels_sentence() {
    in_testbed(|| async {
        sh("ip link set lo up");
        let nl = Netlink::open().unwrap();
        let error = nl.route("lo", &Route::default_via(v4("9.9.9.9"))).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "could not set route default via 9.9.9.9 (the kernel says: Nexthop has invalid gateway)"
        );
        assert_eq!(std::error::Error::source(&error).unwrap().to_string(), "Network is unreachable (os error 101)");
        let error = nl.set_up("nothing").await.unwrap_err();
        assert_eq!(error.to_string(), "interface nothing does not exist");
    });
}

#[test]
fn long_lists_are_read_whole() {
    in_testbed(|| async {
        let mut batch = String::from("link set lo up\n");
        for n in 0..2000 {
            batch.push_str(&format!("route add 10.{}.{}.1/32 dev lo\n", n / 250, n % 250));
        }
        std::fs::write("/run/batch", batch).unwrap();
        sh("ip -batch /run/batch");
        let nl = Netlink::open().unwrap();
        let routes = nl.routes().await.unwrap();
        assert_eq!(routes.iter().filter(|route| route.table == 254).count(), 2000);
    });
}
