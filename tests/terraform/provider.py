"""A Terraform provider with schemas and nothing behind them, on a unix socket: enough for `validate`, and for `test` with
mock_provider.

usage: provider.py SCHEMA.json SOCKET GENERATED      GENERATED: where tfplugin5_pb2.py lies

Says "ready" on standard output, and ends when its standard input does.
"""

import json
import sys
from concurrent import futures

import grpc

schema_file, socket, generated = sys.argv[1:]
sys.path.insert(0, generated)
import tfplugin5_pb2 as pb  # noqa: E402
import tfplugin5_pb2_grpc as rpc  # noqa: E402

# Arguments of provider blocks that the modules here use.
PROVIDER = {"region": "string", "profile": "string", "default_tags": "dynamic", "kubernetes": "dynamic"}


def block(shape):
    message = pb.Schema.Block()
    for name, attribute in sorted(shape["attributes"].items()):
        required, only_read = attribute.get("required", False), attribute.get("computed", False)
        message.attributes.add(
            name=name,
            type=json.dumps(attribute["type"]).encode(),
            required=required,
            optional=not required and not only_read,
            computed=not required,
        )
    for name, nested in sorted(shape["blocks"].items()):
        nesting = pb.Schema.NestedBlock.NestingMode.Value(nested["nesting"])
        message.block_types.add(
            type_name=name,
            block=block(nested["block"]),
            nesting=nesting,
            min_items=nested["min"],
            max_items=nested["max"],
        )
    return message


class Provider(rpc.ProviderServicer):
    def GetSchema(self, request, context):
        with open(schema_file) as file:
            shapes = json.load(file)
        answer = pb.Schemas()
        for name, kind in sorted(PROVIDER.items()):
            answer.provider.block.attributes.add(name=name, type=json.dumps(kind).encode(), optional=True)
        for name, shape in shapes["resources"].items():
            answer.resource_schemas[name].block.CopyFrom(block(shape))
        for name, shape in shapes["data"].items():
            answer.data_source_schemas[name].block.CopyFrom(block(shape))
        return answer

    def PrepareProviderConfig(self, request, context):
        return request

    def ValidateResourceTypeConfig(self, request, context):
        return pb.Fine()

    ValidateDataSourceConfig = Configure = Stop = ValidateResourceTypeConfig


server = grpc.server(futures.ThreadPoolExecutor(4), options=[("grpc.max_send_message_length", -1)])
rpc.add_ProviderServicer_to_server(Provider(), server)
server.add_insecure_port(f"unix:{socket}")
server.start()
print("ready", flush=True)
sys.stdin.read()
server.stop(0)
