//! Whose accept queue is drained, and when the sockets that outlive workers are let go.

use super::*;

#[test]
fn the_queue_of_a_worker_that_hangs_is_drained_until_it_is_healthy_again() {
    let mut world = World::healthy(ports("a", &[9001, 9002]));
    assert_eq!(world.untaken, BTreeMap::new());
    world.fall(1);
    assert_eq!(world.untaken, BTreeMap::from([(1, Untaken::Hangs)]));
    world.fail(1);
    assert_eq!(world.untaken, BTreeMap::from([(1, Untaken::Hangs)]));
    world.pass(1);
    assert_eq!(world.untaken, BTreeMap::new());
}

#[test]
fn the_queue_of_a_worker_that_is_to_end_is_drained_until_it_has_ended() {
    let mut world = World::healthy(ports("a", &[9001]));
    world.apply(1, [ports("a", &[9002])]);
    world.up(2);
    assert_eq!(world.untaken, BTreeMap::new(), "it drains, and takes what waits");
    world.idle(1);
    assert_eq!(world.untaken, BTreeMap::from([(1, Untaken::Stops)]));
    world.exit(1);
    assert_eq!(world.untaken, BTreeMap::new());
}

#[test]
fn a_port_is_released_when_nobody_will_inherit_its_sockets() {
    let inherit = |mut service: config::Service| {
        Arc::make_mut(&mut service.worker).socket = SocketMode::Inherit;
        service
    };
    let mut world = World::healthy(inherit(ports("a", &[9001, 9002])));
    world.exit(1);
    world.gone(1);
    assert_eq!(world.released, [], "its successor takes them over");
    world.apply(1, [inherit(ports("a", &[9001]))]);
    world.idle(2);
    world.exit(2);
    assert_eq!(world.released, [], "somebody of it may have them still");
    world.gone(2);
    assert_eq!(world.released, ["127.0.0.1:9002".parse().unwrap()]);
}
